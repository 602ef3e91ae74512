"""Most tests of this room compare in float64, with TensorFlow's own tapes."""

import keras

collect_ignore_glob: list[str] = []
if keras.backend.backend() != "tensorflow":
    # What holds everywhere is in `test_anywhere.py`.
    collect_ignore_glob += ["test_[!a]*.py", "rules/*"]
