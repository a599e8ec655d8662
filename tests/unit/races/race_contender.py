"""A contender for test_races.py: its loss and the step at which it fails are given by the request."""

import sys
import time

from megalite.races.race_turns import Turns, request

if __name__ == "__main__":
    asked, turns = request(), Turns()

    def step(number: int) -> float:
        if number == asked.get("ends"):
            sys.exit("it broke")
        end = time.process_time() + asked.get("seconds", 0.0)
        while time.process_time() < end:
            pass
        return asked["loss"]

    turns.serve(step)
