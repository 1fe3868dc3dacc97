"""The part of privet that runs on one person's device.

The person's texts and personal head never leave it.
"""
