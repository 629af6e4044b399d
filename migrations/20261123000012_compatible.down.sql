DROP TABLE compatible_from;
