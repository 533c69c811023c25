"""A server on this machine: duets in the browser, and the models for other programs.

One thread owns the model (`studio`); the web (`app`) only passes messages to it. What may come in
is said in `messages` and checked in `guard`.
"""
