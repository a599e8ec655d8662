"""`launcher/run.py`: stock `deepspeed` with guards, exit codes and restarts."""
