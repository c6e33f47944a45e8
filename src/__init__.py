"""Fine-tuning, measuring and streaming of Whisper."""

import os

# torch on a CPU then asks Linux for huge pages, which most systems leave to programs: 43 % of the page faults and three
# quarters of the system time of a training run (tiny.en, two cores, 2026-11-27). Read at torch's first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
