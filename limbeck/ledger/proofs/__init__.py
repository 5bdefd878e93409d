"""What is handed to strangers: files that prove something about a run without showing the rest.

documents    their shapes, and the signed checkpoint in each
disclosure   one field of one row
share        every row's class and tokens, blinded
spot_check   the rows that a public seed picks, and the bound they give
bounds       the statistics of it
consistency  that one checkpoint continues another
"""
