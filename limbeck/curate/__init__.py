"""Completion -> Verdict: which answers are kept, and why the others were dropped.

The room:

    curate    folds the filters over the completions and writes one verdict for each
    filters   the filters, and the one tuple that lists them
    loops     finds answers that repeat the same words over and over
    tools     refuses a recipe whose answers with tools would be paid for and dropped
"""
