"""A model and held-out rows in, scores with intervals and a report out.

In reading order:

evaluate       base and tuned on held-out rows: the road from rows to printed scores
asking         rows that are asked, of held-out files and of files of questions
records        answers and scores, written down as they are made, and gone on with after a kill
metrics        scores of an answer against its reference
intervals      how far a score would move on other rows
overlap        rows that the training files hold too
results        all_results.json
tables         scores as rows of text
report         eval_report.md and eval_report.png
answer_file    a file of questions answered, without scores
tasks          benchmark questions from local files
benchmark      them asked, and counted by subject
"""
