"""``python -m lrf_lightning.sweeps FOLDER``: see :mod:`lrf_lightning.sweeps.summary`."""

from lrf_lightning.sweeps.summary import main

if __name__ == "__main__":
    main()
