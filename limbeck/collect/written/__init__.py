"""Prompts that a teacher writes when it is told to, journaled and paid for as answers are.

kinds     the kinds of such sources: what is asked for each candidate
wording   what teachers are told, with digests
author    asks a teacher
likeness  which texts are too much alike
tally     what became of the candidates, and when to give up
source    all of it: a source of the recipe to prompts
pilot     what having them written takes, before it is paid for
"""
