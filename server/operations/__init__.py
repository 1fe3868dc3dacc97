"""The operator's side: set-up, certificates, enrolment, control, commands."""
