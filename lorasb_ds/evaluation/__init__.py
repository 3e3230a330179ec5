"""What a model answers, and whether it is right: `lorasb eval`.

`evaluator` is the whole; `model` loads a base with an adapter, not trained; `rows` and `tasks` say
what is asked; `scoring` what counts as right; `lm_eval` runs lm-evaluation-harness.
Imports `export` and what is below it; `training` neither imports it nor is imported by it.
"""
