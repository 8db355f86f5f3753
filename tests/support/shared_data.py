"""Where the real data, tokenizers and tiny models lie that some tests read."""

import os
import pathlib

DATA = pathlib.Path(
    os.environ.get("DPOJAX_TEST_DATA", pathlib.Path(__file__).parents[2] / ".." / "shared" / "data")
).resolve()
