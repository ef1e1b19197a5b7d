import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { before, test } from 'node:test'
import { FileNotFoundError, FileType, FilesystemEventType, InvalidArgumentError } from 'e2b'
import { eventually, makeSandbox, seconds } from './world.mjs'

let sandbox
before(async () => {
  sandbox = await makeSandbox({ timeoutMs: seconds(1800) })
})

const allBytes = new Uint8Array(Array.from({ length: 2560 }, (_, n) => n % 256))

async function collect(stream) {
  const parts = []
  for await (const part of stream) parts.push(part)
  return new Uint8Array(Buffer.concat(parts))
}

for (const [name, options] of [
  ['multipart', {}],
  ['octet-stream', { useOctetStream: true }],
  ['gzip', { gzip: true }],
]) {
  test(`bytes by ${name} come back in every format`, async () => {
    const path = `bytes/${name}.bin`

    const info = await sandbox.files.write(path, allBytes.buffer, options)

    assert.equal(info.path, `/home/user/${path}`)
    assert.deepEqual(await sandbox.files.read(path, { format: 'bytes' }), allBytes)
    assert.deepEqual(await sandbox.files.read(path, { format: 'bytes', gzip: true }), allBytes)
    assert.deepEqual(await collect(await sandbox.files.read(path, { format: 'stream' })), allBytes)
    const blob = await sandbox.files.read(path, { format: 'blob' })
    assert.deepEqual(new Uint8Array(await blob.arrayBuffer()), allBytes)
  })
}

test('text, blobs and streams are written', async () => {
  const large = randomBytes(3_000_000)
  await sandbox.files.write('t.txt', 'wörld 🔥')
  await sandbox.files.write('b.bin', new Blob([allBytes]))
  await sandbox.files.write('s.bin', new Blob([large]).stream())

  assert.equal(await sandbox.files.read('t.txt'), 'wörld 🔥')
  assert.deepEqual(await sandbox.files.read('b.bin', { format: 'bytes' }), allBytes)
  assert.deepEqual(Buffer.from(await sandbox.files.read('s.bin', { format: 'bytes' })), large)
})

test('an empty file is empty in every format', async () => {
  await sandbox.files.write('empty', '')

  assert.equal(await sandbox.files.read('empty'), '')
  assert.equal((await sandbox.files.read('empty', { format: 'bytes' })).length, 0)
  assert.equal((await collect(await sandbox.files.read('empty', { format: 'stream' }))).length, 0)
})

test('several files go up in one call', async () => {
  const names = ['many/one.txt', 'many/deep/er/two.txt', "many/with space 'q'.txt", 'many/ünï.txt']

  const infos = await sandbox.files.write(names.map((path) => ({ path, data: path })))

  assert.deepEqual(infos.map((info) => info.path), names.map((name) => `/home/user/${name}`))
  for (const name of names) assert.equal(await sandbox.files.read(name), name)
})

test('directories and entries', async () => {
  assert.equal(await sandbox.files.makeDir('d/e/f'), true)
  assert.equal(await sandbox.files.makeDir('d/e/f'), false)
  await sandbox.files.write('d/e/file', '12345')
  const moved = await sandbox.files.rename('d/e/file', 'd/e/other')
  const info = await sandbox.files.getInfo('d/e/other')
  const entries = await sandbox.files.list('d', { depth: 3 })

  assert.equal(moved.path, '/home/user/d/e/other')
  assert.deepEqual([info.type, info.size, info.owner], [FileType.FILE, 5, 'user'])
  assert.ok(info.modifiedTime instanceof Date)
  assert.deepEqual(entries.map((each) => each.path).sort(), [
    '/home/user/d/e', '/home/user/d/e/f', '/home/user/d/e/other',
  ])
  await sandbox.files.remove('d')
  assert.equal(await sandbox.files.exists('d'), false)
})

test('metadata stays with the file', async () => {
  await sandbox.files.write('meta', 'x', { metadata: { author: 'Ada' } })

  assert.deepEqual((await sandbox.files.getInfo('meta')).metadata, { author: 'Ada' })
})

test('a watcher calls back', async () => {
  await sandbox.files.makeDir('watched')
  const events = []

  const handle = await sandbox.files.watchDir('watched', (event) => events.push(event), { recursive: true })
  await sandbox.files.write('watched/sub/new.txt', 'x')
  await eventually(() => events.some((each) => each.type === FilesystemEventType.CREATE && each.name === 'sub'), {
    what: 'a create event',
  })
  await handle.stop()
})

test('what is missing or of the wrong kind is told apart', async () => {
  await assert.rejects(sandbox.files.read('missing'), FileNotFoundError)
  await assert.rejects(sandbox.files.list('missing'), FileNotFoundError)
  await assert.rejects(sandbox.files.read('/home'), InvalidArgumentError)
})

test('signed URLs work without a token', async () => {
  const headers = { 'E2b-Sandbox-Id': sandbox.sandboxId, 'E2b-Sandbox-Port': '49983' }
  const form = new FormData()
  form.append('file', new Blob([allBytes]), 'ignored')

  const upload = await fetch(await sandbox.uploadUrl('signed.bin', { useSignatureExpiration: 60 }), {
    method: 'POST', body: form, headers,
  })
  const download = await fetch(await sandbox.downloadUrl('signed.bin'), { headers })

  assert.equal(upload.status, 200)
  assert.deepEqual(new Uint8Array(await download.arrayBuffer()), allBytes)
})
