"""Who says so, and when: keys, signatures, checkpoints, notes, time-stamps.

keys         the signing key and the secret behind all salts; they lie outside of RUN
envelope     DSSE envelopes around in-toto statements
statements   what is signed: checkpoints and notes
checkpoints  making and reading the checkpoints of a ledger
notes        signed notes of reviewers
timestamps   RFC 3161
"""
