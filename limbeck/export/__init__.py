"""What a run hands to others, made from its evidence and never by hand.

evidence     what a RUN directory's records and ledger say, gathered once
facts        a run whose ledger verifies, with shares, rulings and files: what all exports rest on
formats      the table of formats
words        figures, digests and foreign text as a reader sees them
pruning      what a pruned student kept, in words
licences     licences by the names that standards have for them
rulings      what the gate ruled on each teacher's outputs, or what the register says where it did not
properties   what no standard has a field for, under `limbeck:`
card         RUN/student/README.md, the model card
data_card    the card of the training set
spdx         SPDX 3.0.1
cyclonedx    CycloneDX 1.7
croissant    Croissant 1.1
eu_summary   the EU's summary of training content
gguf_file    the student as one GGUF file
gguf_words   its tokenizer, as GGUF has it
"""
