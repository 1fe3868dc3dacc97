"""The privacy core of both sides: clip, noise, encode, account."""
