"""What fine-tuning did to the model: every table of the model card, from answers to the report.

Every evaluation writes one JSONL line per item as soon as it exists (`psysafe.journal`), so that a kill loses nothing
and a second start continues. It ends in a `result.json` of tables, and `report` puts several of them on one page.

Read first, in this order; docs/map.md has a line for every file:

    benchmark           what a command of eval.py is, and the run that all benchmarks with a judge share
    models_under_test   the base and adapters, each with each system prompt (a variant), and what they answer
    judge_models        judges that are models, and the loop that asks them
    replies             what a judge's reply plainly says
    comparison          intervals of a benchmark's figures, paired tests between variants
    result              the tables, and how they came about
"""
