"""launcher=vast: one VastAI instance runs one sweep. What survives it is the copy: a mirror, or W&B.

client.py calls the `vastai` program; plan.py decides, without acting; ledger.py remembers what was
rented and what it cost; script.py fills in onstart.sh, which an instance runs; renting.py acts.
"""
