// Commits an order, rolls one back, and is refused. Prints what it saw as JSON.

const { Client } = require('pg');

async function place(client, url, note) {
  await client.query('INSERT INTO orders VALUES ($1)', [note]);
  const options = { key: note, ordered: 'orders' };
  const { rows } = await client.query(
    "SELECT requeuest.fire('POST', $1, body => $2, options => $3) AS id",
    [url, Buffer.from(note), options],
  );
  return rows[0].id;
}

async function main([database, url]) {
  const client = new Client({ connectionString: database });
  await client.connect();
  await client.query('BEGIN');
  const rolledBack = await place(client, url, 'rolled back');
  await client.query('ROLLBACK');
  await client.query('BEGIN');
  const committed = await place(client, url, 'committed');
  await client.query('COMMIT');
  const refused = await client
    .query("SELECT requeuest.fire('POST', 'ftp://a/')")
    .catch(({ code, column, hint }) => [code, column, hint]);
  await client.end();
  console.log(JSON.stringify([committed, rolledBack, refused]));
}

main(process.argv.slice(2));
