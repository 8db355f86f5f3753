"""How does a file become a batch? Every arrow is one module and changes the type.

jsonl(.gz) · parquet · arrayrecord · hub dataset
  | records.py    rows (dict), random access, no dataset knowledge
  v rows.py       Group(prompt, responses, pairs)      dataset quirks end here
  | tokens.py     token ids, EOS, truncation           text ends here
  | row_plan.py   which row each group goes to, from lengths alone
  v row_filling.py  PackedBatch (packing.py), static shapes    raggedness ends here
  | batches.py    grain: shuffle -> map -> pack -> prefetch, resumable
  v dpojax.training
"""
