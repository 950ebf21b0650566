"""The whole recipe as one chain of the launchers: what is done, what is left, what came out."""
