"""What everything else stands on: errors, number formats, pytrees, the axis glossary. Imports nothing of jfp8kv."""
