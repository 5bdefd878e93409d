"""Prompts and the teacher's answers, journaled before anyone parses them.

readers      rows of JSONL, Parquet, CSV and TSV files and of data sets, a piece at a time
files        rows to chat messages, every wrong row named
templates    chat messages of several columns
digests      a set of digests in 32 bytes an entry
rows         one row of them: its messages, or what is wrong with it
contents     what a row says beyond text: tools, calls, images, a schema
self_prompt  prompts the teacher writes itself
written      prompts a teacher writes when it is told to
split        which prompts are held out
prompts      the stage `prompts`: all sources to prompts.parquet
teachers     the one seam: what a teacher is, whoever runs it
answers      a teacher whose answers lie in a file
local        a teacher run here by transformers
endpoints    teachers asked over HTTP: what is sent, how fast, and for how much
journal      requests and raw answers, kept through a kill or a power cut
journal_sums what it says of many requests
migrations   its tables, version by version
writer       the journal's one writer while requests are under way
completing   answers to completions, while others are under way or from the journal
collect      the stage `collect`: every prompt, teacher and sample to completions.parquet
"""
