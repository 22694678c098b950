"""Config-driven runs over files of prompts: `jfp8kv batch CONFIG.yaml`.

A config is read (`source`), checked (`check`, by the models of `config`) and run (`run`): rows come from a file (`inputs`),
become requests (`plain`, `openai`), go through an engine (`engine`), and what is finished is appended to a journal (`journal`),
of which the output is made at the end (`outputs`). `on_ray` has engines elsewhere answer. `record` keeps what a run must be the same in to go on, `view` shows it.
"""
