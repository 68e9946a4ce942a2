"""`llava retrain`: new data in, one model out."""
