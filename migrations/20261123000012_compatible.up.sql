-- Which releases can work with this schema: those that know at least this migration. Releases with
-- an older newest migration refuse to work. Only a migration that removes or changes what older
-- releases use raises it: see "Expand, migrate, contract" in CONTRIBUTING.md.
CREATE TABLE compatible_from (
    version bigint NOT NULL,
    one_row boolean PRIMARY KEY DEFAULT true CHECK (one_row)
);
INSERT INTO compatible_from (version) VALUES (20261123000012);
