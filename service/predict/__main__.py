"""`python -m service.predict`."""

from service.predict.command import main

main()
