"""Config-driven runs over files of prompts: `jfp8kv batch CONFIG.yaml`.

A config is read (`source`), checked (`check`, by the models of `config`) and run (`run`): rows come from a file (`inputs`),
become requests (`plain`, `openai`) that an engine (`engine`) answers (`answer`, elsewhere `on_ray`), and what is finished is
appended to a journal (`journal`), of which the output is made in the end (`outputs`, `merge`). `record` keeps what a run must
be the same in to go on, `view` shows it. `whole` has the tasks that make one thing of all rows, `dry_run` only looks.
"""
