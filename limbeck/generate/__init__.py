"""Answers from a causal language model, in batches, each row with a random stream of its own.

    from limbeck.generate import Sampling, sample_batch

    sampling = Sampling(max_tokens=256, temperature=0.7)
    answers = sample_batch(model, prompts, sampling, stop_ids={2}, seeds=seeds, rows=128)
    answers[0].tokens, answers[0].finish_reason

Laws. A row's token is a function of its distribution and of one uniform, and its uniforms are a function of
its seed alone: neighbours, order, batch size, and the moment at which other rows finish, change nothing but
the rounding of the logits. No global random state is read or written. The model is left as it was found, the
mode of every module and the attention implementation, also after an error.

    draw        from logits and one uniform per row to one token per row
    attention   one query per row, where the usual kernel is slow
    cache       prompts read, and the keys and values of the rows that decode
    batch       the loop
"""

from limbeck.generate.batch import Generated, sample_batch
from limbeck.generate.draw import Sampling, next_tokens, uniforms

__all__ = ["Generated", "Sampling", "next_tokens", "sample_batch", "uniforms"]
