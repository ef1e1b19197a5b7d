import assert from 'node:assert/strict'
import { before, test } from 'node:test'
import { CommandExitError, InvalidArgumentError, NotFoundError, TimeoutError } from 'e2b'
import { eventually, makeSandbox, seconds } from './world.mjs'

let sandbox
before(async () => {
  sandbox = await makeSandbox({ timeoutMs: seconds(1800) })
})

test('output, exit code and error come back', async () => {
  await assert.rejects(sandbox.commands.run('echo out; echo err >&2; exit 42'), (error) => {
    assert.ok(error instanceof CommandExitError)
    assert.deepEqual([error.exitCode, error.stdout, error.stderr], [42, 'out\n', 'err\n'])
    return true
  })
})

test('callbacks see output as it comes', async () => {
  const seen = []
  const note = (text) => {
    seen.push(...text.trim().split('\n'))
    if (text.includes('one')) sandbox.files.write('heard', '')
  }

  // It ends only when somebody has heard its first line.
  await sandbox.commands.run('echo one; until [ -e heard ]; do sleep 0.05; done; echo two; echo bad >&2', {
    onStdout: note,
    onStderr: note,
  })

  assert.equal(seen[0], 'one')
  assert.deepEqual(seen.sort(), ['bad', 'one', 'two'])
})

test('user, cwd and environment are as asked', async () => {
  const result = await sandbox.commands.run('echo $(id -un) $PWD $COLOUR', {
    user: 'root',
    cwd: '/tmp',
    envs: { COLOUR: 'blue' },
  })

  assert.equal(result.stdout, 'root /tmp blue\n')
  await assert.rejects(sandbox.commands.run('pwd', { cwd: '/no/such' }), InvalidArgumentError)
})

test('background commands are listed, connected and killed', async () => {
  const handle = await sandbox.commands.run('sleep 2345', { background: true, timeoutMs: 0 })

  const listed = (await sandbox.commands.list()).map((each) => each.pid)
  const again = await sandbox.commands.connect(handle.pid)
  const killed = await again.kill()

  assert.ok(listed.includes(handle.pid))
  assert.equal(killed, true)
  await assert.rejects(handle.wait(), (error) => error.exitCode === -1 && error.error === 'signal: killed')
  assert.equal(await sandbox.commands.kill(handle.pid), false)
})

test('stdin is sent and closed', async () => {
  const handle = await sandbox.commands.run('cat; echo done', { background: true, stdin: true })

  await sandbox.commands.sendStdin(handle.pid, 'one\n')
  await sandbox.commands.sendStdin(handle.pid, new Uint8Array([0x74, 0x77, 0x6f, 0x0a]))
  await sandbox.commands.closeStdin(handle.pid)

  assert.equal((await handle.wait()).stdout, 'one\ntwo\ndone\n')
})

test('a command that takes too long is killed', async () => {
  await assert.rejects(sandbox.commands.run('sleep 3456', { timeoutMs: seconds(1) }), TimeoutError)

  await eventually(async () => !(await sandbox.commands.run('ps ax -o args')).stdout.includes('3456'), {
    what: 'the command is killed',
  })
})

test('what is not there is not found', async () => {
  await assert.rejects(sandbox.commands.connect(999999), NotFoundError)
  await assert.rejects(sandbox.commands.sendStdin(999999, 'x'), NotFoundError)
})

test('large output is complete', async () => {
  const result = await sandbox.commands.run('seq 1 100000', { timeoutMs: seconds(60) })

  assert.equal(result.stdout, Array.from({ length: 100000 }, (_, n) => `${n + 1}\n`).join(''))
})

test('many commands at once', async () => {
  const results = await Promise.all(Array.from({ length: 40 }, (_, n) => sandbox.commands.run(`echo ${n}`)))

  assert.deepEqual(results.map((each) => each.stdout), Array.from({ length: 40 }, (_, n) => `${n}\n`))
})

test('a terminal echoes, resizes and exits', async () => {
  let output = ''
  const decoder = new TextDecoder()
  const pty = await sandbox.pty.create({ cols: 80, rows: 24, onData: (data) => (output += decoder.decode(data)) })

  await sandbox.pty.sendInput(pty.pid, new TextEncoder().encode('stty size\n'))
  await eventually(() => output.includes('24 80'), { what: 'the size' })
  await sandbox.pty.resize(pty.pid, { cols: 132, rows: 50 })
  await sandbox.pty.sendInput(pty.pid, new TextEncoder().encode('stty size; exit\n'))
  const result = await pty.wait()

  assert.equal(result.exitCode, 0)
  assert.ok(output.includes('50 132'))
})
