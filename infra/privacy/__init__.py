"""The evidence pack: a served model is watched from outside while it is called; nothing is seen to leave.

Its parts: a plan of calls that carry canaries (plan), the caller (calling), what is watched (subject,
network, kernel, search), what that proves (detectors), the report (report), the order (watching, prove).
"""
