"""The parts of a training run that `train.py` and `trainer.py` put together."""
