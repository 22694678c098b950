"""What a cache costs in quality: several caches over the same texts, side by side, measured on what each really stores."""
