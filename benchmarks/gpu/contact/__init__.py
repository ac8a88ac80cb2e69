"""The sections of ``first_contact.py``: what each measures or checks on a GPU, and how they run."""
