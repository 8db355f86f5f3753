"""The way of the data: every arrow is one module and changes the type.

jsonl(.gz) · parquet · arrayrecord · hub dataset
  | records.py    rows (dict), random access, no dataset knowledge
  v triples.py    Group(prompt, responses, pairs)      dataset quirks end here
  | tokens.py     token ids, EOS, truncation           text ends here
  v packing.py    PackedBatch, static shapes           raggedness ends here
  | pipeline.py   grain: shuffle -> map -> pack -> prefetch, resumable
  v dpojax.train
"""
