"""One-fault copies of good evidence, made in code: what is done to a copy, and the place that a verifier has to name.

`files`, `entries` and `signatures` have faults of a RUN directory, `proofs` faults of what is handed to strangers.
`kit` holds what they are made of. `forger` writes a ledger anew the way somebody with the signing key would, so that
the one fault is the only thing that does not agree.
"""
