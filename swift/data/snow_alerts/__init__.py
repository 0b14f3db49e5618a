"""snow-alerts: facts of a winter weather warning -> the notice for the public, in Chinese or English. Made up by
``generate``; no warning in it was ever issued.
"""
