import assert from 'node:assert/strict'
import { test } from 'node:test'
import {
  AuthenticationError, NotFoundError, Sandbox, SandboxError, SandboxNotFoundError, TimeoutError,
} from 'e2b'
import { eventually, makeSandbox, pause, seconds } from './world.mjs'

test('pause, connect and the files in between', async () => {
  const sandbox = await makeSandbox()
  await sandbox.files.write('kept.txt', 'kept')
  const handle = await sandbox.commands.run('sleep 2222', { background: true, timeoutMs: 0 })

  assert.equal(await sandbox.pause(), true)
  assert.equal(await sandbox.pause(), false)
  assert.equal((await sandbox.getInfo()).state, 'paused')
  const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: seconds(60) })

  assert.equal(await again.files.read('kept.txt'), 'kept')
  assert.ok((await again.commands.list()).some((each) => each.pid === handle.pid))
})

test('an expired sandbox is gone', async () => {
  const sandbox = await makeSandbox({ timeoutMs: seconds(8) })

  await eventually(() => sandbox.getInfo().then(() => false, (error) => error instanceof SandboxNotFoundError), {
    within: 90, what: 'the sandbox expires',
  })

  // The edge may be cutting its connections in this moment.
  await eventually(() => sandbox.isRunning().then((running) => !running, () => false), { within: 30, what: 'it is gone' })
  await assert.rejects(Sandbox.connect(sandbox.sandboxId), SandboxNotFoundError)
})

test('a timeout may pause', async () => {
  const sandbox = await makeSandbox({ timeoutMs: seconds(8), lifecycle: { onTimeout: 'pause' } })

  await eventually(async () => (await sandbox.getInfo()).state === 'paused', { within: 90, what: 'auto-pause' })
  const again = await sandbox.connect({ timeoutMs: seconds(60) })

  assert.equal((await again.commands.run('echo alive')).stdout, 'alive\n')
})

test('setTimeout moves the end', async () => {
  const sandbox = await makeSandbox({ timeoutMs: seconds(120) })

  await sandbox.setTimeout(600_000)

  const left = (await sandbox.getInfo()).endAt - Date.now()
  assert.ok(Math.abs(left - 600_000) < 60_000, `${left}`)
})

test('a snapshot starts another sandbox', async () => {
  const sandbox = await makeSandbox()
  await sandbox.files.write('file.txt', 'saved')

  const snapshot = await sandbox.createSnapshot()
  const copy = await makeSandbox({}, snapshot.snapshotId)
  const content = await copy.files.read('file.txt')
  const listed = (await Sandbox.listSnapshots({ sandboxId: sandbox.sandboxId }).nextItems()).map((s) => s.snapshotId)

  assert.equal(content, 'saved')
  assert.deepEqual(listed, [snapshot.snapshotId])
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
})

test('errors are of their class', async () => {
  const missing = 'i' + '0'.repeat(19)

  await assert.rejects(Sandbox.create('no-such-template'), SandboxError)
  await assert.rejects(Sandbox.create({ apiKey: 'e2b_' + '0'.repeat(40) }), AuthenticationError)
  await assert.rejects(Sandbox.connect(missing), SandboxNotFoundError)
  await assert.rejects(Sandbox.getInfo(missing), NotFoundError)
  await assert.rejects(Sandbox.setTimeout(missing, 60_000), NotFoundError)
  assert.equal(await Sandbox.kill(missing), false)
})

for (const end of ['kill', 'timeout']) {
  test(`a stream ends with an error after ${end}`, async () => {
    const sandbox = await makeSandbox()
    const handle = await sandbox.commands.run('sleep 100000', { background: true, timeoutMs: 0 })
    const waiting = handle.wait().then(
      () => assert.fail('ended as if nothing had happened'),
      (error) => error
    )
    await pause(300)

    if (end === 'kill') await sandbox.kill()
    else await sandbox.setTimeout(0)
    const moment = Date.now()
    const error = await waiting

    assert.ok(Date.now() - moment < seconds(60), `${Date.now() - moment} ms`)
    assert.ok(error instanceof TimeoutError || error instanceof SandboxError, `${error}`)
  })
}

test('calls to a killed sandbox say that it is gone', async () => {
  const sandbox = await makeSandbox()
  await sandbox.kill()

  await assert.rejects(sandbox.commands.run('echo'), (error) => /not running|was not found|timeout/i.test(error.message))
  await assert.rejects(sandbox.files.read('/etc/hostname'), TimeoutError)
})
