"""What fine-tuning did to the model: every table of the model card, from answers to the report.

Every evaluation writes one JSONL line per item as soon as it exists (`psysafe.journal`), so that a kill loses nothing
and a second start continues. It ends in a `result.json` of tables, and `report` puts several of them on one page.

    benchmark           what a command of eval.py is, and the run that all benchmarks with a judge share
    models_under_test   the base and adapters, each with each system prompt (a variant), and what they answer
    judge_models        judges that are models, and the loop that asks them
    judge_input         what a judge is shown: instructions, of a file or our own, and how much of an answer
    several_judges      judges side by side, each as alone; judge_agreement: their kappas
    translation         answers into English before they are judged
    answer_language     the share of answers in the prompt's language; what word lists cannot read
    word_list_judge     the rule-based judge, for tests and the miniature table; its words: word_lists
    rules_accuracy      what it is worth, said beside its tables
    criteria            the four criteria: the judge's prompt, its parser, the summary of many scores
    datasets            the rows of a benchmark, from a file or from the hub
    comparison          intervals of a benchmark's figures, paired tests between variants
    statistics          Wilson, Newcombe, bootstrap, McNemar, sign test, Holm
    labels, kappa       what people and judges said of answers, and how far they agree
    rating              a page on which people rate answers, blind
    overlap             prompts of a benchmark that stand in training rows
    result, report      tables with how they came about; several results on one page
    table_files         the same tables as CSV and LaTeX; transcript: prompts, answers, judges' words, for reading
    published_results   the paper's figures
    benchmarks/         one file each: four_criteria, agreement, xstest, sorry_bench, mmlu, hellaswag, miniature
"""
