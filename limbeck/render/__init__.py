"""Completion -> Example: kept answers as tokens, with a mask over what the teacher wrote.

The room:

    render    the stage
    chat      one chat through the chat template to tokens and loss mask
    examples  RUN/examples: writing and reading
    batches   examples to batches with next to no padding, and the tensors of a batch
"""
