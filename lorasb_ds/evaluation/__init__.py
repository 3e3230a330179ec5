"""Generate a model's answers and score them: `lorasb eval`.

`evaluator.evaluate` runs it all on a model of `model.prepare_model` and `model.start_model`.
`rows.load_eval_rows` makes questions of rows, `tasks` finds their task and choices, `scoring`
judges answers, `numbers` reads the number in one, `reasoning_gym` checks the scorers of that
package, `proportions.Proportion` is a score with its interval, `classification`
evaluates classifiers, and `lm_eval` runs lm-evaluation-harness instead.
Imports `export` and what is below it; `training` neither imports it nor is imported by it.
"""
