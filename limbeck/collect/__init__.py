"""Prompts and the teacher's answers, journaled before anyone parses them.

files        JSONL, Parquet and CSV files to chat messages, every wrong row named
rows         one row of them: its messages, or what is wrong with it
contents     what a row says beyond text: tools, calls, images, a schema
self_prompt  prompts the teacher writes itself
split        which prompts are held out
prompts      the stage `prompts`: all sources to prompts.parquet
teachers     the one seam: what a teacher is, whoever runs it
answers      a teacher whose answers lie in a file
local        a teacher run here by transformers
endpoints    teachers asked over HTTP: what is sent, how fast, and for how much
journal      requests and raw answers, kept through a kill or a power cut
migrations   its tables, version by version
writer       the journal's one writer while requests are under way
collect      the stage `collect`: every prompt, teacher and sample to completions.parquet
"""
