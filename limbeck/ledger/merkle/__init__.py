"""The Merkle tree over everything a ledger holds.

tree     roots and proofs (RFC 9162), pure functions
stored   the tree as it lies in ledger.db
fields   an example as sixteen salted fields and a share; leaf hashes
hashing  leaf hashes of thousands of examples at once
salts    salts from one secret (RFC 5869)
"""
