"""What a run hands to others: so far the model card, made from the evidence.

evidence   what a RUN directory's records and ledger say, gathered once
words      figures, digests and foreign text as a reader sees them
card       RUN/student/README.md
"""
