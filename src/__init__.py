"""Fine-tuning, measuring and streaming of Whisper."""

import os

# torch on a CPU then asks Linux for huge pages, which most systems leave to programs: 43 % of the page faults and three
# quarters of the system time of a training run (tiny.en, two cores, 2026-11-27). Read at torch's first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# libgomp, the OpenMP of torch's and CTranslate2's wheels, waits 100 rounds instead of 300,000 for the next step once a
# process has more of its threads than cores (one model that is loaded and decodes is enough), and then lets the thread
# sleep; with "active" it waits 1,000 (its manual, GOMP_SPINCOUNT). On two cores CTranslate2 then decodes a clip in half
# the time (2026-12-01). KMP_BLOCKTIME: the OpenMP of conda's builds would wait without end.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "active"
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    os.environ.setdefault("KMP_BLOCKTIME", "200")
