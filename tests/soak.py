"""How long `make soak` goes on: LORAFUSE_SOAK hours, of which each of its tests has the same share."""

import os

N_TESTS = 17  # 12 of test_fuzz.py, 3 of test_kill.py, 2 of test_space.py
SHARE_S = float(os.environ.get("LORAFUSE_SOAK", "0")) * 3600 / N_TESTS
