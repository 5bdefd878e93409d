"""What a teacher's terms say about training on its outputs, and what follows for one use of the student.

    terms       the register: one file a version of terms, as facts with a clause, dates and how they were read
    gate        three-valued: allowed, refused, or unknown, which refuses too
    register/   the files

Nothing here is legal advice, and nothing says that something is illegal: a verdict is "refused under our reading of
clause X, version Y".
"""
