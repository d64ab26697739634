"""`python -m pulse_railway` is `pulse-railway`."""

from pulse_railway.cli import main

main()
