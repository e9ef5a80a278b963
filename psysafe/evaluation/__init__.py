"""What fine-tuning did to the model: every table of the model card, from generations to the report.

Every part writes one JSONL line per item as soon as it exists (`journal`), so that a kill loses nothing and a second
start continues, and ends in a `result.json` of tables (`results`), which `report` puts on one page.

    rules            refusal judge by word lists, for tests and the miniature table
    judge, scores    the four-criterion judge: its prompt and parser; its table
    agreement        judge against people: Cohen's kappa
    xstest, sorry_bench   refusal benchmarks
    multiple_choice, scoring   MMLU and HellaSwag, numerically equal to lm-eval
    transport        chat completions with deadlines and retries, and many items at once
"""
