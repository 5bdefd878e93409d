"""What a teacher's terms say about training on its outputs, and what follows for one use of the student.

    terms       the register: one file a version of terms, as facts with a clause, dates and how they were read
    gate        three-valued: allowed, refused, or unknown, which refuses too
    sources     whose terms count for a row
    waivers     signed, named, with a reason and a last day
    rulings     what was said of a set, as it lies in RUN/gate
    obligations what travels with the student, carried out
    token       what the trainer asks for
    stage       the stage of the pipeline, and the same question before anything is bought
    evidence    what a verifier checks
    register/   the files

Nothing here is legal advice, and nothing says that something is illegal: a verdict is "refused under our reading of
clause X, version Y".
"""
