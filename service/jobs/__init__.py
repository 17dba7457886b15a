"""Work on many files, which an interruption does not lose.

Finding the files and journals serve both the jobs of the server (`POST /v2/jobs`) and solo-predict.
"""
