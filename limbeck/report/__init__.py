"""What a person reads: one self-contained HTML file.

report      the stage: RUN's records, scores and ledger to RUN/report.html
sentences   the run in plain words, computed from its figures
figures     the loss curve and the scores as SVG
view        what the template is given
"""
