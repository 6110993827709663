"""Everything of Dialog for TypeScript, found here: what the table says, and that it is so."""
